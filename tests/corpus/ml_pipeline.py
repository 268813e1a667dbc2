"""A pipeline of scikit-learn: split, scale, fit, cross-validate, search, keep the model."""

# %%
import warnings

import numpy as np
from sklearn.datasets import make_classification
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import classification_report, confusion_matrix
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

X, y = make_classification(n_samples=200, n_features=6, n_informative=4, random_state=0)
X_train, X_test, y_train, y_test = train_test_split(X, y, test_size=0.25, random_state=0)
X_train.shape, X_test.shape

# %%
search = GridSearchCV(
    make_pipeline(StandardScaler(), LogisticRegression()), {"logisticregression__C": [0.1, 1.0]}, cv=3
)
search.fit(X_train, y_train)
print(search.best_params_)
print(confusion_matrix(y_test, search.predict(X_test)))
print(classification_report(y_test, search.predict(X_test), digits=3))

# %%
import pickle

with open("model.pickle", "wb") as file:
    pickle.dump(search.best_estimator_, file)
with open("model.pickle", "rb") as file:
    again = pickle.load(file)
print(np.array_equal(again.predict(X_test), search.predict(X_test)))
warnings.warn("the model is small", RuntimeWarning)

# %%
round(float(search.score(X_test, y_test)), 3)
