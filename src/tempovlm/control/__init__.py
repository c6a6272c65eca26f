"""Policies, which choose the setting of a request, and the guard, which keeps the deadline; no engine here."""
