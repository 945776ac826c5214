"""The study on real language: film reviews and sentences whose words were labelled by people."""
