"""What a trained run is used for: requests for samples, editing, segmentation."""
