"""Heart disease: is a coronary artery narrowed, judged by what is known before angiography?

Detrano et al., American Journal of Cardiology 64 (1989) 304-310; UCI repository, data set 45.
Four hospitals sent 920 patients to angiography; the label is a narrowing of more than 50% in
any major vessel (UCI's `num` above 0).

The ranges are clinical, and were not taken from these patients: `allowed` is what a living adult
can have, `scaling` about the span between healthy and severe in cardiology clinics.

What was not done says something of the patient and of the hospital. There is one indicator an
examination and not one a field: under privacy every parameter pays in noise, and the fields of one
exercise test are missing together (its indicator is the heart rate's; the slope is read apart).
"""

from fedward.tasks.schema import Field, Schema
from fedward.tasks.tabular import BinaryTabularTask

SCHEMA = Schema(
    fields=(
        Field(
            name="age",
            kind="number",
            description="age in completed years (UCI: age)",
            unit="years",
            allowed=(18, 120),
            scaling=(30, 80),
            missing_indicator=False,
            loinc="30525-0",
        ),
        Field(
            name="sex",
            kind="category",
            description="administrative sex (UCI: sex)",
            categories=("female", "male"),
            missing_indicator=False,
            loinc="46098-0",
        ),
        Field(
            name="chest_pain",
            kind="category",
            description="type of chest pain (UCI: cp)",
            categories=("typical angina", "atypical angina", "non-anginal", "asymptomatic"),
            missing_indicator=False,
        ),
        Field(
            name="resting_blood_pressure",
            kind="number",
            description="systolic blood pressure at rest, on admission (UCI: trestbps)",
            unit="mmHg",
            allowed=(40, 300),
            scaling=(90, 180),
            missing=("0", "-9"),
            missing_indicator=False,
            loinc="8480-6",
        ),
        Field(
            name="cholesterol",
            kind="number",
            description="total cholesterol in serum (UCI: chol)",
            unit="mg/dl",
            allowed=(50, 1000),
            scaling=(120, 320),
            missing=("0", "-9"),
            loinc="2093-3",
        ),
        Field(
            name="high_fasting_glucose",
            kind="flag",
            description="fasting blood glucose above 120 mg/dl (UCI: fbs)",
            missing=("-9",),
            missing_indicator=False,
        ),
        Field(
            name="resting_ecg",
            kind="category",
            description="electrocardiogram at rest (UCI: restecg)",
            categories=("normal", "st-t abnormality", "lv hypertrophy"),
            missing=("-9",),
            missing_indicator=False,
        ),
        Field(
            name="max_heart_rate",
            kind="number",
            description="highest heart rate in the exercise test (UCI: thalach)",
            unit="beats/min",
            allowed=(30, 250),
            scaling=(80, 200),
            missing=("0", "-9"),
        ),
        Field(
            name="exercise_angina",
            kind="flag",
            description="angina during the exercise test (UCI: exang)",
            missing=("-9",),
            missing_indicator=False,
        ),
        Field(
            name="st_depression",
            kind="number",
            description="ST depression by exercise relative to rest; negative is elevation "
            "(UCI: oldpeak)",
            unit="mm",
            allowed=(-8, 10),
            scaling=(0, 4),
            missing=("-9",),
            missing_indicator=False,
        ),
        Field(
            name="st_slope",
            kind="category",
            description="slope of the ST segment at peak exercise (UCI: slope)",
            categories=("upsloping", "flat", "downsloping"),
            missing=("-9",),
        ),
        Field(
            name="vessels_fluoroscopy",
            kind="number",
            description="major vessels coloured by fluoroscopy, 0 to 3 (UCI: ca)",
            allowed=(0, 3),
            scaling=(0, 3),
            missing=("-9",),
        ),
        Field(
            name="thallium_scan",
            kind="category",
            description="thallium stress scan (UCI: thal)",
            categories=("normal", "fixed defect", "reversible defect"),
            missing=("-9",),
        ),
        Field(
            name="heart_disease",
            kind="flag",
            description="a major vessel narrowed by more than 50% on angiography (UCI: num > 0)",
            role="label",
        ),
    ),
)

HEART_DISEASE = BinaryTabularTask(name="heart-disease", schema=SCHEMA)
