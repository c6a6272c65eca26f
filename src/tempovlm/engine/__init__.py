"""Fast execution of one request or a batch. Importing it does not import torch: `threads` must run first."""
