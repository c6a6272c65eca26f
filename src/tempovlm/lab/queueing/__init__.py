"""Requests that share a lane, simulated: who is answered right and on time under which load, policy and price."""
