"""Replay whole calls as CUDA graphs: rehearse, capture, replay while all is as it was, or let the call run."""
