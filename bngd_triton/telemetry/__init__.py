"""Logs and pictures of gradient statistics."""
