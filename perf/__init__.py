"""The suite that measures: peers side by side, interleaved, as ratios within one run."""
