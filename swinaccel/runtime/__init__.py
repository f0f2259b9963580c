"""Run every call: dispatcher → plan, if its guard holds → launches; or a sentence, and the original."""
