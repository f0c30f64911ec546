"""DeepSpeed: its engine and the state in it, its reports, the differences between its versions."""
