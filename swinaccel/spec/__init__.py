"""The facts of windows and blocks, and their reference: no module of torch.nn, no kernel."""
