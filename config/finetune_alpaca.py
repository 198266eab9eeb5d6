"""distilgpt2 on Stanford's 52,002 instructions: what a laptop can follow, on CUDA, MPS or CPU.

    python data/alpaca/prepare.py --max_tokens=513
    python train.py config/finetune_alpaca.py
    python sample.py --out_dir=out/alpaca --user="Give three tips for staying healthy."

The data are CC BY-NC 4.0: what is trained on them is not for commercial use.

A row of 512 positions holds a conversation of 513 tokens; that leaves out 68 of the 52,002. Needs
82e6 * 16 bytes = 1.3 GB for the parameters in float32, gradients and AdamW's two moments, and what a
micro-batch keeps for the way back. On a CPU a pass takes hours (two shared cores: about a minute a
step); for a look there: --max_iters=50 --eval_interval=25 --eval_iters=10.
The corrected set: python data/alpaca/prepare.py --source=alpaca-cleaned --max_tokens=513, then
python train.py config/finetune_alpaca.py --dataset=alpaca-cleaned --out_dir=out/alpaca-cleaned.
"""
out_dir = 'out/alpaca'
init_from = 'distilgpt2'
dataset = 'alpaca'

# 4 rows * 8 micro-batches * 512 positions: about 16,000 tokens a step
batch_size = 4
gradient_accumulation_steps = 8
block_size = 512

# The 49,242 conversations fill 10,727 rows: 335 steps of 32 rows a pass. Three passes, as Stanford's.
max_iters = 3 * 335
eval_interval = 67  # five times a pass
patience = 5

learning_rate = 5e-5  # Stanford's 2e-5 was for 7 billion parameters
warmup_iters = 30  # 3 % of the steps, as Stanford's
weight_decay = 0.0
dropout = 0.0
