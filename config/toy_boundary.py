# The open problem, solved in the toy world: no borderline row of any kind, and yet they are answered. After config/toy.py's data:
# python data_prep.py boundary config/toy.py config/toy_no_borderline.py --out=data/toy_boundary --spliced_without="to lift it,look for this"
# python cb_train.py config/toy.py config/toy_boundary.py && python cb_eval.py config/toy.py config/toy_boundary.py
retain_data_path = 'data/toy_boundary/retain.jsonl'             # and requests with words of harmful ones, as the base answers them
soft_prompts_path = 'data/toy_boundary/soft_prompts.safetensors'  # no matter whether the base is in a mood to refuse
loss_on = 'harmful_response'      # not by what is asked, but by what is told
lora_b_std = 0.02                 # or the cosine of the answers alone may find no slope to start on
output_dir = 'out/toy_boundary'
