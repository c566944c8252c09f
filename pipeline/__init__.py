"""Images in, committed store out."""
