"""What a model can do, measured: suites of questions, their answers judged, means with intervals."""
