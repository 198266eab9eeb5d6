"""distilgpt2 on Stanford Alpaca's 52,002 instructions.

    python data/alpaca/prepare.py --max_tokens=513
    python train.py config/finetune_alpaca.py
    python evaluate.py --models=distilgpt2,out/alpaca --dataset=alpaca

The data are CC BY-NC 4.0: a model trained on them is not for commercial use.
Memory: 82e6 parameters * 16 bytes = 1.3 GB, and what the backward pass needs.
On two shared CPU cores a step takes about a minute: for a look, --max_iters=50
--eval_interval=25 --eval_iters=10. The corrected data: prepare with
--source=alpaca-cleaned, train with --dataset=alpaca-cleaned
--out_dir=out/alpaca-cleaned.

As published (the InstructAI project) / here
- distilgpt2, Stanford's rows, answers side by side / the same.
- The prompt begins with "### Instruction:" / with Stanford's first sentence.
  As published: prepare with --template=alpaca-short.
- Loss on the whole sequence / on the response. As published: --loss_on=all.
- Learning rate, batch size and epochs unknown / Stanford's epochs and warm-up,
  and a higher rate: Stanford's 2e-5 was for 7 billion parameters.
- Rows of over 513 tokens: unknown / cut, 67 of them.
- No loss was published. Ours is not known: no weights could be downloaded.
"""
out_dir = 'out/alpaca'
init_from = 'distilgpt2'
dataset = 'alpaca'

# 4 rows * 8 micro-batches * 512 positions: about 16,000 tokens a step
batch_size = 4
gradient_accumulation_steps = 8
block_size = 512

# 49,305 conversations fill 10,790 rows: 338 steps of 32 rows a pass.
epochs = 3.0
# five times a pass
eval_interval = 67
patience = 5

learning_rate = 5e-5
# 3 % of the steps
warmup_iters = 30
weight_decay = 0.0
dropout = 0.0
