"""From the bytes of a request to a question: its body, its budget and its picture, each within limits."""
