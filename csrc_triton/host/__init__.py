"""What the host does for the kernels: outputs, workspace, the choice of a path, and the launch."""
