"""Draw pictures of masks, features and predictions."""
