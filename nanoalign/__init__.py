"""nanoalign: aligning language models, from scratch, in plain PyTorch."""


class UserError(Exception):
    """A mistake the user can mend: one sentence that says what was wrong, where, and what to do."""
