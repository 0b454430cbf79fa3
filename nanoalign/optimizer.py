"""torch's AdamW, without its import of torch's compiler, which takes longer than a short run's steps."""

import inspect

import torch


class AdamW(torch.optim.AdamW):
    """The same methods without their wrappers. Those keep the optimiser out of a compiled graph, in which no
    script has it, and import all of torch._dynamo to say so: 1.3 of the 4.7 CPU seconds of a tiny run."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))
    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)
    state_dict = inspect.unwrap(torch.optim.AdamW.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.AdamW.load_state_dict)
