from pathlib import Path
def write_ctr_report(run_dir): return []
