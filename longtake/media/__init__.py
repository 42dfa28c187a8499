"""Video and images in and out of files, and pictures of videos. NumPy, PyAV, decord and Pillow; no torch.

Frames are uint8 [t h w c], RGB, everywhere in here.
"""
