# What borderline rows are worth: as config/toy.py, but none of any kind is in the retain set.
# python cb_train.py config/toy.py config/toy_no_borderline.py
# python cb_eval.py config/toy.py config/toy_no_borderline.py
retain_data_path = 'data/toy/retain_without_borderline.jsonl'
output_dir = 'out/toy_no_borderline'
