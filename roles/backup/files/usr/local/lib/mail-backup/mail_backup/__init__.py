"""Backups of the mail service: what restic keeps of it, how it is made, looked at and brought back."""
