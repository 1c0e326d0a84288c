"""Engines that several generations share."""
