"""Programs as XLA prints them for a TPU, in few lines."""


def entry(*lines, before=""):
  body = "\n".join(f"  {line}" for line in lines)
  return (
    f"HloModule m, is_scheduled=true\n\n{before}\nENTRY %main (x: f32[4]) -> f32[] {{\n{body}\n}}\n"
  )
