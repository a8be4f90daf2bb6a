"""`build`: from a user's own images to a bundle on a device, in stages that are kept."""
