"""Mamba: channel order, learned masks, physically smaller models."""
