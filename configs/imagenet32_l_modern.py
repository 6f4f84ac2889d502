"""iGPT-L on ImageNet at 32×32 by the modern recipe: the paper's row but for what gained most in small.

  python -m igpt_jax.main --config configs/imagenet32_l_modern.py --workdir runs/imagenet32_l_modern

Reproduces: nothing of the paper's; 1,398,426,624 parameters. Each line's gain is that of 500 steps on CIFAR-10 at
16×16, 1.7M parameters, one seed (docs/results.md, "A modern recipe"), in nats per token of validation; at this
size nothing was measured. The learning rate is the paper's; at the small size Muon had twice Adam's.
Hardware: a step of 672.9 ms on v5e:4x4 and 241.1 ms on v6e:4x4 by forecast (the paper's recipe: 540.9
and 164.2).
Expect: unknown; below imagenet32_l.py's test likelihood if what holds in small holds here.
Data: TFDS imagenet2012, prepared once (launch/prepare_data.sh).
"""

from igpt_jax.config import imagenet


def get_config():
  config = imagenet("l", 32)
  config.model.positions = "rope2d"  # -0.260 alone, -0.151 after 1,500; -0.100 beside Muon
  config.model.value_embeddings = True  # -0.054 alone, -0.020 after 1,500; -0.011 beside both
  config.train.optimizer = "muon"  # -0.539 alone, -0.191 after 1,500 steps
  config.train.schedule = "wsd"  # -0.296 alone, -0.030 after 1,500; -0.043 beside the other three
  return config
