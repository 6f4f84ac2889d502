"""Every setting there is, with its default.

0 and "" leave the choice to the preset, the data or a checkpoint, as comments say. A field that is new,
or has a new name, needs an entry in `history.py`: older workdirs go on.
"""

from ml_collections import ConfigDict


def base() -> ConfigDict:
  """All fields. 0 and "" leave the choice to the preset, the data or a checkpoint, as comments say.

  A checkpoint is one of this program (a workdir, or one step of it), OpenAI's (model.ckpt-N) or
  Hugging Face's (a directory).
  """
  config = ConfigDict()
  config.job = "pretrain"  # a name in igpt_jax.jobs
  config.seed = 0  # of everything drawn, 0 to 2**32 - 1
  config.init_from = ""  # checkpoint that pretrain takes its first parameters from; "": random ones
  config.checkpoint = ""  # what the other jobs read; "": --workdir's newest, or else init_from

  config.data = ConfigDict()
  config.data.name = "digits"  # digits, folder, tokens, or a TFDS name
  config.data.path = ""  # of a folder of pictures, or of tokens [N, H·W] in .npy
  config.data.data_dir = ""  # TFDS' data_dir; "": TFDS' default
  config.data.resolution = 8  # height and width the model sees
  config.data.augment = "none"  # of training pictures: none, paper, cifar, shift
  # Share of train held out; 0: none, as in the paper's final runs, which are evaluated on test alone.
  config.data.validation = 0.1
  config.data.validation_split = ""  # a stored split held out instead: validation, val; "": none
  config.data.max_bad = 0.001  # share of unreadable pictures to put up with
  config.data.resample = "fused"  # of `paper` in training: fused (one resize), literal (the two)
  config.data.threads = 0  # that load pictures, in each process; 0: chosen
  config.data.workers = 0  # processes that load pictures; 0: this one
  config.data.cache_mb = 512  # a data set whose decoded pictures fit in this is read once
  # Read folders and files of tokens whole to know them, also if they seem unchanged.
  config.data.verify = False
  config.data.manual_dir = ""  # job prepare: archives fetched by hand; "": TFDS' default

  config.palette = ConfigDict()
  # .npy [k, 3] in [-1, 1]; "default": the project's 512 colours, which were fitted to CIFAR-10
  # (igpt_jax/data/assets/README.md); "": the checkpoint's, or fitted to the training pictures.
  config.palette.path = ""
  config.palette.size = 0  # colours; 0: the checkpoint's, those of the path, or 512
  config.palette.images = 10_000  # training pictures it is fitted to, at most

  config.model = ConfigDict()
  config.model.size = ""  # s, m, l, xl; "": init_from's, or s
  config.model.n_layer = 0  # 0: the size's
  config.model.n_head = 0
  config.model.n_embd = 0
  config.model.dtype = ""  # float32, bfloat16; "": bfloat16 on accelerators, float32 on CPU
  config.model.remat = ""  # none, names, full, offload; "": the size's
  config.model.attention = "auto"

  config.objective = ""  # autoregressive, masked (BERT); "": init_from's, or autoregressive
  config.mask_probability = 0.15  # of the masked objective

  config.train = ConfigDict()
  config.train.batch_size = 128
  config.train.accumulate = 1  # parts that a batch is worked through in, one update in all
  config.train.steps = 1_000_000
  config.train.learning_rate = 0.0  # 0: the size's
  config.train.warmup_steps = 0
  config.train.schedule = "cosine"  # to 0 at `steps`; or constant
  config.train.b1 = 0.9
  config.train.b2 = 0.95
  config.train.weight_decay = 0.0
  config.train.clip_norm = 0.0  # 0: no clipping
  config.train.log_every = 50
  config.train.eval_every = 1_000  # 0: at the end only
  config.train.eval_images = 10_000  # of the validation split, at most; 0: all
  config.train.checkpoint_every = 1_000
  config.train.keep = 3  # newest checkpoints
  config.train.keep_every = 0  # and those at multiples of this; 0: none
  config.train.save_retry_seconds = 600.0  # in which a save that fails is tried again; 0: never

  config.mesh = ConfigDict()  # devices; one may be -1: what is left
  config.mesh.data = -1
  config.mesh.fsdp = 1
  config.mesh.tensor = 1

  config.guard = ConfigDict()  # against bad numbers, in training
  config.guard.in_row = 10  # updates left out one after the other, not being finite, until …
  config.guard.then = "rollback"  # to the last checkpoint before, with other data; or stop, warn
  config.guard.spike = 1.0  # nats/token above the last losses' median that are a spike; 0: none is
  config.guard.spike_then = "warn"  # or rollback, stop
  config.guard.rollbacks = 3  # of one run, at most
  config.hang_seconds = 1_800.0  # training without progress, after which it ends; 0: never
  config.host_seconds = 100  # of silence, after which a host counts as lost; with --distributed
  config.profile = ConfigDict({"start": 0, "steps": 0})  # which training steps to trace; 0: none

  config.evaluate = ConfigDict()
  config.evaluate.split = "test"
  config.evaluate.batch_size = 128
  config.evaluate.images = 0  # at most; 0: all
  config.evaluate.masks = 1  # masked objective: masks drawn per picture
  config.evaluate.baseline_images = 50_000  # training pictures the unigrams are counted on

  config.watch = False  # evaluate, probe, sample: every checkpoint of a run, until it ends
  config.watch_seconds = 30.0  # between two looks
  config.watch_patience = 0.0  # seconds without a new one after which watching ends; 0: never

  config.features = ConfigDict()  # of probe and lowdata
  config.features.layers = ()  # of 0 to n_layer; (): all
  config.features.grid = 1  # means over grid × grid blocks of pixels, side by side; 1: over all
  config.features.masks = 0  # BERT: means over that many masked inputs; 0: nothing is masked
  config.features.batch_size = 128
  config.features.images = 0  # training pictures, at most; 0: all
  config.features.eval_images = 0  # of validation, and of test, at most; 0: all
  config.features.cache = ""  # where they are kept; "": features/ in the workdir
  config.features.baselines = ("pixels", "pca", "random")  # beside them: these, or some of them

  config.probe = ConfigDict()
  config.probe.method = ""  # lbfgs, sgd (ImageNet's size); "": by the number of pictures
  config.probe.concatenate = ()  # layers, side by side, as one more set of features
  config.probe.around_best = 0  # that many layers around the best, likewise; 5 in the paper
  config.probe.max_iterations = 1_000  # of L-BFGS
  config.probe.cached = True  # sgd: from stored features; False: from pictures, each time anew
  config.probe.learning_rates = (30.0, 10.0, 3.0, 1.0, 0.3)  # sgd: all at the same time
  config.probe.steps = 1_000_000  # sgd
  config.probe.batch_size = 128  # sgd
  config.probe.eval_every = 10_000  # sgd: validation accuracy, and a checkpoint

  config.lowdata = ConfigDict()
  config.lowdata.labels_per_class = (1, 4, 25, 250, 400)
  config.lowdata.trials = 5  # random subsets of each

  config.finetune = ConfigDict()
  config.finetune.scratch = False  # from random parameters, to compare with
  config.finetune.layer = -1  # whose features the head reads; -1: the last
  config.finetune.generative = 1.0  # weight of the objective's loss; 0: classification alone
  config.finetune.classification = 1.0  # weight of the classification loss
  config.finetune.augment = ""  # of training pictures; "": data.augment
  config.finetune.images = 0  # training pictures, at most; 0: all
  config.finetune.batch_size = 128
  config.finetune.learning_rate = 0.0  # 0: a tenth of the size's
  config.finetune.warmup_steps = 0
  config.finetune.steps = 10_000  # at most
  config.finetune.eval_every = 250  # validation accuracy, and a checkpoint
  config.finetune.patience = 10  # evaluations without a better one after which it ends; 0: never
  config.finetune.masks = 5  # BERT: masks per picture in evaluation

  config.sample = ConfigDict()
  config.sample.samples = 32  # unconditional pictures; 0: compile leaves sampling out
  config.sample.completions = 8  # held-out pictures to complete
  config.sample.per_picture = 4  # completions of each
  config.sample.keep = 0.5  # share of the rows that is given
  config.sample.temperature = 1.0  # 1e-6 or more; 0: the likeliest colour
  config.sample.top_k = 0  # of the likeliest colours; 0: all
  config.sample.top_p = 1.0  # 1e-6 to 1: the likeliest colours whose probabilities reach it
  config.sample.cache = ""  # of keys and values: float32, bfloat16, int8; "": the model's dtype
  config.sample.scale = 0  # picture pixels per model pixel in the PNGs; 0: chosen
  config.sample.batch_size = 64  # complete: samples drawn at a time

  config.images = ""  # complete: a file, a glob in quotes, or a folder; "": samples from nothing
  config.keep = 0.5  # complete: share of the rows (or columns) that is given
  config.hide = "lower"  # complete: and by BERT upper, left, right, centre, or an image of a mask
  config.passes = 16  # complete, by BERT: over the picture, the surest pixels first
  config.n = 8  # complete: samples of each picture

  config.quality = ConfigDict()
  config.quality.images = 1_000  # samples, completions, and pictures of test to compare them with
  config.quality.network = ""  # a checkpoint, or a network in .onnx; "": the model itself
  config.quality.layer = -1  # of that checkpoint; -1: the middle one

  config.source = ""  # convert: a checkpoint
  config.target = ""  # convert: what to write; nothing may be there
  config.format = "orbax"  # convert: orbax (this program's own), huggingface, openai

  config.download = ConfigDict()  # of the released files
  config.download.model = "s"  # s, m, l; "": none
  config.download.step = 1_000_000  # or 131000, 262000, 524000
  config.download.bert = False
  config.download.data = "imagenet"  # test split as tokens: imagenet, cifar10; "": none
  config.download.directory = "downloads"
  config.download.url = ""  # of a mirror; "": where they were released

  config.topology = ""  # compile: chips that needn't be here, v5p:4x4x4; "": this machine's devices
  config.plan = False  # compile: look for the fastest mesh, batch and remat that fit

  config.benchmark = ConfigDict()  # of this machine
  config.benchmark.parts = ("training", "attention", "sampling", "input")
  config.benchmark.repeats = 5  # timings of each, medians are told
  config.benchmark.samples = 8  # pictures that are sampled at a time
  config.benchmark.pictures = 200  # of the data set, that the input pipeline is timed on

  config.log = ConfigDict()
  config.log.tensorboard = False
  config.log.wandb = False
  config.log.wandb_project = "igpt_jax"
  return config
