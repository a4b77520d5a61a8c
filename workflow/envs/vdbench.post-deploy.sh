# Run by Snakemake in the new environment, from the folder of the checkout.
pip install --no-deps --editable .
