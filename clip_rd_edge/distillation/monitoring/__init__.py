"""What a run says about itself: metrics, plots, trackers, evaluations, answers to sample images."""
