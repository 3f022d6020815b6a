"""Whole models: `fuse(model)` and the backend of ``torch.compile``.

    capture      TorchDynamo reads a model's forward
    nodes        the nodes of its graph
    calls        what they call: convolutions, batch norms, activations
    accesses     what they read and write
    normal_form  one form for each of them; handwritten: for activations, too
    matcher      finds chains; match: what it finds
    rewrite      puts calls of the operators in their place; pooling: for pools, too
    checkpoints  bodies of graphs that run more than once
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
