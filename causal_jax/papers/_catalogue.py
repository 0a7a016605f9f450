"""The published systems this library is about: which there are, whether built or not."""

from typing import NamedTuple


class System(NamedTuple):
    """One system: its name (that of its entry, once there is one), paper and main claim."""

    name: str
    title: str
    arxiv: str
    claim: str


SYSTEMS = (
    System(
        "abrupt_icl",
        "The mechanistic basis of data dependence and abrupt learning in an in-context "
        "classification task",
        "2312.03002",
        "in-context learning appears abruptly, by an induction head; burstiness, classes and Zipf "
        "skew decide between context and weights",
    ),
    System(
        "af1",
        "All for One: LLMs Solve Mental Math at the Last Token With Information Transferred From "
        "Other Tokens",
        "2509.09650",
        "mental arithmetic needs cross-token attention of the last token in a few middle layers "
        "only",
    ),
    System(
        "ancat",
        "Lookahead When It Matters: Adaptive Non-causal Transformers for Streaming Neural "
        "Transducers",
        "2305.04159",
        "a scheduler that looks ahead where it matters is as accurate as full lookahead, at a "
        "fraction of its latency",
    ),
    System(
        "cab",
        "CAB: Comprehensive Attention Benchmarking on Long Sequence Modeling",
        "2210.07661",
        "efficient attentions rank differently as self or cross, causal or noncausal attention",
    ),
    System(
        "care_ca",
        "Cause and Effect: Can Large Language Models Truly Understand Causality?",
        "2402.18139",
        "knowledge-graph facts and counterfactual statements improve answers to causal questions",
    ),
    System(
        "causal2vec",
        "Causal2Vec: Improving Decoder-only LLMs as Versatile Embedding Models",
        "2507.23386",
        "a prepended contextual token and two-token pooling embed better than last-token pooling, "
        "attention unchanged",
    ),
    System(
        "causal_vqa",
        "What's Missing in Vision-Language Models? Probing Their Struggles with Causal Order "
        "Reasoning",
        "2506.00869",
        "vision-language models tell objects, not causal order; reversed sentences as hard "
        "negatives help",
    ),
    System(
        "causalmm",
        "Mitigating Modality Prior-Induced Hallucinations in Multimodal Large Language Models via "
        "Deciphering Attention Causality",
        "2410.04780",
        "contrasting with counterfactual attention while decoding reduces hallucination",
    ),
    System(
        "causalverse",
        "CausalVerse: Benchmarking Causal Representation Learning with Configurable High-Fidelity "
        "Simulations",
        "2510.14049",
        "recovering the block of causal variables does not mean recovering its components",
    ),
    System(
        "context_awareness",
        "On the Loss of Context-awareness in General Instruction Fine-tuning",
        "2411.02688",
        "instruction tuning moves attention off the user's text; an indicator token for "
        "context-dependent turns keeps it",
    ),
    System(
        "context_knob",
        "Controllable Context Sensitivity and the Knob Behind It",
        "2411.07404",
        "one direction in one layer sets whether a model answers from its context or its prior",
    ),
    System(
        "contextual_memory_reweaving",
        "Contextual Memory Reweaving in Large Language Models Using Layered Latent State "
        "Reconstruction",
        "2502.02046",
        "latent states kept from all layers and woven back raise long-range recall",
    ),
    System(
        "dst",
        "Distributional Semantics Tracing: A Framework for Explaining Hallucinations in Large "
        "Language Models",
        "2510.06107",
        "the strength of the contextual pathway predicts the rate of hallucination",
    ),
    System(
        "focallens",
        "FocalLens: Instruction Tuning Enables Zero-Shot Conditional Image Representations",
        "2504.08368",
        "an image encoder that reads an instruction retrieves by the attribute asked for",
    ),
    System(
        "gam",
        "Gated Associative Memory: A Parallel O(N) Architecture for Efficient Sequence Modeling",
        "2509.00605",
        "a convolution and a gated bank of learned patterns train faster than attention to a "
        "lower loss",
    ),
    System(
        "hyper_attention",
        "HyperAttention: Long-context Attention in Near-Linear Time",
        "2310.05869",
        "sorted hashing and sampled columns replace softmax attention in near-linear time at a "
        "small loss",
    ),
    System(
        "icl_linear_regression",
        "In-Context Linear Regression Demystified: Training Dynamics and Mechanistic "
        "Interpretability of Multi-Head Softmax Attention",
        "2503.12734",
        "multi-head softmax attention learns one step of debiased gradient descent, with diagonal "
        "key-query matrices and output weights that sum to zero",
    ),
    System(
        "iperceive",
        "iPerceive: Applying Common-Sense Reasoning to Multi-Modal Dense Video Captioning and "
        "Video Question Answering",
        "2011.07735",
        "features trained under a backdoor-adjusted objective carry causes rather than "
        "co-occurrence",
    ),
    System(
        "ireason",
        "iReason: Multimodal Commonsense Reasoning using Videos and Natural Language with "
        "Interpretability",
        "2107.10300",
        "the objects of a scene decide which event pairs are causal there",
    ),
    System(
        "lawcat",
        "LAWCAT: Efficient Distillation from Quadratic to Linear Attention with Convolution across "
        "Tokens for Long Context Modeling",
        "2509.18467",
        "a pretrained transformer becomes gated linear attention with convolutions, and keeps "
        "retrieving far beyond its training length",
    ),
    System(
        "lcl",
        "Link-Context Learning for Multimodal LLMs",
        "2308.07891",
        "training on invented names makes a model use the image-name links of its context",
    ),
    System(
        "leaf",
        "Learning to Focus: Causal Attention Distillation via Gradient-Guided Token Pruning",
        "2506.07851",
        "pruning tokens that only the student's loss depends on makes distillation better",
    ),
    System(
        "medim",
        "Discrete Diffusion Models with MLLMs for Unified Medical Multimodal Generation",
        "2510.06131",
        "a causal decoder without its mask becomes one discrete-diffusion model of text and images",
    ),
    System(
        "mixing_mechanisms",
        "Mixing Mechanisms: How Language Models Retrieve Bound Entities In-Context",
        "2510.06182",
        "bound entities are retrieved by a mixture of a positional, a lexical and a reflexive "
        "signal",
    ),
    System(
        "modality_mutual_attention",
        "Seeing is Understanding: Unlocking Causal Attention into Modality-Mutual Attention for "
        "Multimodal LLMs",
        "2503.02597",
        "letting image tokens attend to the later question improves multimodal models",
    ),
    System(
        "motionrag",
        "MotionRAG: Motion Retrieval-Augmented Image-to-Video Generation",
        "2509.26391",
        "motion of a new image is learned in context from retrieved videos",
    ),
    System(
        "multihop_masking",
        "Masking in Multi-hop QA: An Analysis of How Language Models Perform with Context "
        "Permutation",
        "2505.11754",
        "a prefix mask and documents in the order of the reasoning help multi-hop answers",
    ),
    System(
        "out_of_context_reasoning",
        "Generalization or Hallucination? Understanding Out-of-Context Reasoning in Transformers",
        "2506.10887",
        "a factorised output-value pair associates facts with implications never shown; the merged "
        "matrix does not",
    ),
    System(
        "pine",
        "Eliminating Position Bias of Language Models: A Mechanistic Approach",
        "2407.01100",
        "with bidirectional documents and positions by importance, answers do not depend on the "
        "order of documents",
    ),
    System(
        "preplan_anchor",
        "Attention Illuminates LLM Reasoning: The Preplan-and-Anchor Rhythm Enables Fine-Grained "
        "Policy Optimization",
        "2510.13554",
        "credit placed where attention shows planning and anchors beats uniform credit in "
        "reinforcement learning",
    ),
    System(
        "recast",
        "Can Large Language Models Infer Causal Relationships from Real-World Text?",
        "2505.18931",
        "models recover causal graphs from long text poorly, the worse the less explicit it is",
    ),
    System(
        "retrieval_heads",
        "Retrieval Head Mechanistically Explains Long-Context Factuality",
        "2404.15574",
        "a few heads copy facts from far away; without them recall from the context is lost",
    ),
    System(
        "subspace_illusion",
        "Is This the Subspace You Are Looking For? An Interpretability Illusion for Subspace "
        "Activation Patching",
        "2311.17030",
        "patching a direction can change the output through a dormant path that the model never "
        "uses",
    ),
    System(
        "thought_anchors",
        "Thought Anchors: Which LLM Reasoning Steps Matter?",
        "2506.19143",
        "a few sentences of a reasoning trace decide its answer, by three independent measures",
    ),
    System(
        "titans",
        "Titans: Learning to Memorize at Test Time",
        "2501.00663",
        "a memory trained while the sequence is read holds more than attention or a linear state",
    ),
    System(
        "variational_context",
        "Grounding Referring Expressions in Images by Variational Context",
        "1712.01892",
        "estimating the context from the candidate, and the candidate from it, grounds "
        "expressions better",
    ),
    System(
        "video_ccam",
        "Video-CCAM: Enhancing Video-Language Understanding with Causal Cross-Attention Masks for "
        "Short and Long Videos",
        "2408.14023",
        "causal cross-attention masks let a projector trained on 16 frames read 96",
    ),
)

OWN = ("block_sparse_attention",)  # entries about this library's own work, beside the systems
