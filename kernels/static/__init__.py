"""What can be said of the kernels without a GPU: ahead-of-time compilation, launch plans, traffic and bounds."""
