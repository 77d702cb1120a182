"""A small world of flat shapes: what the embedded model is trained on and how its images are judged."""
