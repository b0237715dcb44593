"""The neural processing unit: Qualcomm's HTP backend, and models of what it computes and how long it takes."""
