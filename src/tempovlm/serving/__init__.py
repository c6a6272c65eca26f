"""The HTTP API: OpenAI's, with a budget in milliseconds. HTTP only; who waits for whom is `control/queue.py`'s."""
