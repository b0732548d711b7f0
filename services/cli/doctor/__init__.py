"""`nanodeploy doctor`: named checks of this machine and of the running cluster, each failure with its fix."""
