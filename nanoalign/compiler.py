"""torch.compile where there is a compiler, and one line where there is none."""

import functools

import torch

_works = True


def compile_or_eager(function, dynamic: bool = True, mode: str | None = None):
    """torch.compile(function), or the function itself once there turns out to be no working compiler.

    Compiled when first called: the compiler's own import takes longer than all that a small run imports.
    """
    compiled = functools.cache(lambda: torch.compile(function, dynamic=dynamic, mode=mode))

    def call(*args, **options):
        global _works
        if _works and not torch.compiler.is_compiling():  # else it is part of what is compiled around it
            try:
                return compiled()(*args, **options)
            except torch._dynamo.exc.TorchDynamoException as error:
                _works = False
                print(f"torch.compile fails here ({type(error).__name__}: no C compiler?); running eager.")
        return function(*args, **options)

    return call
