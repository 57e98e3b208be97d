"""The paper's protocols for MMLU, BBH and GSM8K as task files of lm-evaluation-harness."""
