"""Mixture-of-experts behaviour from the PEFT adapters a model already has."""
