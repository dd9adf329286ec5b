"""What a trained run is used for. Each program of sample.py has a module:

sampling         new volumes, from a request for samples (sampling_request) and with edits (editing)
reconstruction   images through the autoencoder and back
segmentation     images to label maps
"""
