"""What changes while a teacher is trained: its checkpoints measured on the same images, one after the other."""
