"""Runs beside each other: what they left in their folders, compared, as tables and as a picture."""
