"""What runs inside the processes under test: the product, with failpoints and perhaps a mutant put in before it is imported."""
