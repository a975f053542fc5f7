"""What ``bench/explain.py`` measures with: the published implementation, the matrix of settings, targets and plots."""
