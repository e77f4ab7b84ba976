"""What the runs on text have in common: settings in a file, the text, training with complete checkpoints."""
