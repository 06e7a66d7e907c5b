"""What a cut destroys is mended in the layers around it, with one layer in memory."""
