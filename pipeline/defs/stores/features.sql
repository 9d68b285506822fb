-- One row per store and day on which it sold something.
SELECT
  CAST(Store AS STRING) AS store,
  CAST(Date AS DATE) AS sold_on,
  CAST(Sales AS DOUBLE) AS sales,
  CAST(Promo AS DOUBLE) AS promotion,
  CAST(SchoolHoliday AS DOUBLE) AS school_holiday,
  StoreType AS store_type,
  Assortment AS assortment,
  State AS state
FROM sales
WHERE Sales > 0
