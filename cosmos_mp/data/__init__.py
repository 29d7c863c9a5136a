"""From video files to training samples: clips, controls, encodings, stores and their order."""
