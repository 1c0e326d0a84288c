"""Receipts for tokens that nobody sees: what a provider commits to, and what an auditor makes of a few openings."""
