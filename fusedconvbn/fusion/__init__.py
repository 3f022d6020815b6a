"""Whole models: `fuse(model)` and the backend of ``torch.compile``.

    capture      TorchDynamo reads a model's forward
    calls        what the calls of its graph are
    normal_form  each of them written in one way
    match        the chains of a graph
    rewrite      calls of the operators in their place
    profile      what a graph saves for backward
    plan         which maps are saved under a budget
    graph        all of that for one graph
    model        a fused model, and when it is captured
    find         the plan of a whole model, from example inputs
    api          fuse, unfuse
    report       explain
    script       a fused model for TorchScript
    sequential   a chain that is built by hand

The operator's modules know nothing of this.
"""
